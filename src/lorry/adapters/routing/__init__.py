"""Routers over the adapters of a mixture, beside that of tokens (`adapters.router`)."""
