"""Workers of `runtime=dist`: who they are, what they are told, and what they send each other."""
