"""Base matrices held in 4 or 8 bits: the tables of values (`codes.py`), how a matrix is packed and opened
again (`packed.py`), and the product of a layer that holds one (`linear.py`)."""
