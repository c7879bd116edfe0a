"""The studies behind the pages of claims and starts: what is run, by which rule it is judged, how it is drawn."""
