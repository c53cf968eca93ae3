"""What several test files share, and what they start in processes of their own."""
