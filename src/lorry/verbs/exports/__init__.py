"""Writers of `lorry export`: PEFT, GGUF, and a mixture of experts in a stock class."""
