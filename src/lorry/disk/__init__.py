"""What reaches the disk: whole or not at all. Every room that writes a directory writes it through
here; no torch.
"""
