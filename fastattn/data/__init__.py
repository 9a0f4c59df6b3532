"""From files to clean documents: reading, repair, quality, duplicates, personal data. It knows no tokens."""

from fastattn.data.pipeline import Cleaning, clean_documents
from fastattn.data.report import Report
from fastattn.data.sources import Document, Skipped, find_files, find_sources, read_documents, text_rank

__all__ = [
    "Cleaning",
    "Document",
    "Report",
    "Skipped",
    "clean_documents",
    "find_files",
    "find_sources",
    "read_documents",
    "text_rank",
]
