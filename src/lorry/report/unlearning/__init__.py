"""What a report of an unlearning run has of its own: charts, and sections of the page."""
