"""Speed, memory and size of a model beside those of another, in one run and in turns."""
