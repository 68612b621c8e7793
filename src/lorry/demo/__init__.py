"""The demo's data: facts about people who do not exist."""
