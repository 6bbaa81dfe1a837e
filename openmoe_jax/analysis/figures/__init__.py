"""What `openmoe-analyze figures` makes of recorded routing: pictures, tables, and sentences with numbers."""
