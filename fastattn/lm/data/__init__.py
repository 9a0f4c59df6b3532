"""From files to clean documents: reading, repair, quality, duplicates, personal data. It knows no tokens."""

from fastattn.lm.data.pipeline import Cleaning, clean_documents
from fastattn.lm.data.report import Report
from fastattn.lm.data.sources import Document, Skipped, find_files, find_sources, read_documents, text_rank

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
