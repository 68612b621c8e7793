"""The way to the Hugging Face hub: a finished run as a repository that Lorry, PEFT and transformers
load.
"""
