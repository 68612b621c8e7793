"""What an adapter's settings mean, beyond their types. No torch here."""
