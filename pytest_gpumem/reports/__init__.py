"""Reports: they turn records into text."""
