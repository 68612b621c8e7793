"""Models: Lorry's own decoder, transformers' models behind the same face, loading, scores and
generation.
"""
