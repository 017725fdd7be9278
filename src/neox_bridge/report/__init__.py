"""Results of other commands as one HTML page; jinja2 and matplotlib are the extra ``[report]``."""
