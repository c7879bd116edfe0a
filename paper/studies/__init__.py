"""The studies behind docs/claims.md and docs/starts.md: what is run, by which rule it is judged, how it is drawn."""
