"""One module per verb: `main(settings) -> exit code`. They put rooms together and print;
nothing is computed here.
"""
