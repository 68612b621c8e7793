"""From files, folders and the hub to rows that know where they came from."""
