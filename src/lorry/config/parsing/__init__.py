"""From what a person typed to settings: command lines, files, other tools' names."""
