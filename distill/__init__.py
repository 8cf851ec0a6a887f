"""Problems -> a teacher's answers -> the right and readable ones, with the life of every row: data to distil from."""
