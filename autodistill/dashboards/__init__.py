"""What Prometheus scrapes and Grafana shows: of a search while it runs, and of a student that is served."""
