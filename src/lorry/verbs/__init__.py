"""One module per verb: `main(settings, notes) -> exit code`. They put rooms together and print;
nothing is computed here.
"""
