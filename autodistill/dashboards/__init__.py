"""What Prometheus scrapes and Grafana shows, for a search while it runs and for a student that is served."""
