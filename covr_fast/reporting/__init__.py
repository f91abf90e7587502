"""The report over many runs: one HTML page that needs no network (`page.write_page`)."""
