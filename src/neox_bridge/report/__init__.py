"""Renders results of other commands as one HTML page. Needs the extra ``[report]``."""
