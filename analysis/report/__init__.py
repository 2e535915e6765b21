"""The report of a sweep or a run: table, figures and one HTML page."""
