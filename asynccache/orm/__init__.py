"""What knows SQLAlchemy: which columns an entity has, how they are stored, and how they become an instance again."""
