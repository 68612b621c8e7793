"""Tasks: data plus a pure loss. The engine and the backends know nothing else about them."""
