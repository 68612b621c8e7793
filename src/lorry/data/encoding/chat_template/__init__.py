"""Chat templates, programs from elsewhere: their sandbox, what they may cost, and what they make of messages."""
