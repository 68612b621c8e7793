"""What a run will need, before anything is loaded: bytes and FLOPs in closed form from the config
alone. No torch here.

shapes (a config's matrices) -> adapters (which of them, at which rank) -> memory, flops, parallel
-> search -> choices (what one run description leaves open) -> report. Every number that was measured rather than
derived is in `constants`.
"""
