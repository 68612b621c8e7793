"""`python -m lorry.kernels`: build the kernels now (an installer does), and say what will run here."""

from lorry.kernels import status

print(status().line())
