"""How results look in tables and figures."""
