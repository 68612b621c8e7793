"""The layers a bank lives in, and the slots of its adapters at them."""
