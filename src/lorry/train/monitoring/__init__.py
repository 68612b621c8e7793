"""What a run tells the outside, and what the outside tells it: events, trackers, process.json,
signals.
"""
