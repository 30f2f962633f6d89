"""Airflow-only code: thin adapters over crpbot_lib."""
