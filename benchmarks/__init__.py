"""What the software costs: each module prints its figures as a table, or as JSON with ``--json``. ``make bench`` runs them all."""
