"""One call of solve: its request, what it loads, what it reports and what it exports."""
