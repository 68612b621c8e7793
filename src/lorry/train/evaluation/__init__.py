"""What a run asks of its adapters while it trains: its task, named sets, a suite of unlearning."""
