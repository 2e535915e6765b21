"""What several routers need; no router is looked for here."""
