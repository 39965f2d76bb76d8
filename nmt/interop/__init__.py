"""Models and data of other toolkits, in and out."""
