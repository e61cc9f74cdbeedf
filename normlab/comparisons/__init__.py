"""Runs beside each other: intervals, fairness, sweeps, reports."""
