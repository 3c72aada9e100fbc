"""Files of others: where weights are found, how they are downloaded, checked and read."""
