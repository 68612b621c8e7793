"""`python -m lorry.kernels`: build the kernels now (an installer does), and say what will run here."""

from lorry.kernels import kernel_status

print(kernel_status().line())
