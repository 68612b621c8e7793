"""`python -m lorry.kernels`: build the kernels now (an installer does), and say what will run here."""

from lorry.errors import ConfigError
from lorry.kernels import kernel_status

try:
    print(kernel_status().line())
except ConfigError as e:
    raise SystemExit(str(e)) from None
