"""The bank inside other people's trainers. Nothing here is imported by the rest of Lorry, and
importing it needs none of them.
"""
