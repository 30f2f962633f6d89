"""The workflow without Airflow: everything here runs, is tested and is reasoned about on its own. Imports no airflow."""
