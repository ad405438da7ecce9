"""Model families: building, describing and exporting them. See README.md beside this file."""
