"""What finished cells say when they are held side by side: statistics, figures, tables and the report."""
