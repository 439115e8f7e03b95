"""SQLAlchemy: an ORM over psycopg and over asyncpg."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, ForeignKey, create_engine, exc, func, inspect, select, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TEXT, insert
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, selectinload

from tests.drivers.conftest import Endpoint


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "authors"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    about: Mapped[dict[str, Any]] = mapped_column(JSONB, default=dict)
    tags: Mapped[list[str]] = mapped_column(ARRAY(TEXT), default=list)
    born: Mapped[dt.datetime | None]
    books: Mapped[list[Book]] = relationship(back_populates="author")


class Book(Base):
    __tablename__ = "books"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    author_id: Mapped[int] = mapped_column(ForeignKey("authors.id"))
    author: Mapped[Author] = relationship(back_populates="books")


def authors() -> list[Author]:
    return [
        Author(name=f"author {n}", about={"n": n}, tags=[f"t{n}", "all"], born=dt.datetime(1900 + n, 1, 1),
               books=[Book(title=f"book {n}.{k}") for k in range(3)])
        for n in range(30)
    ]


@pytest.fixture
def sync_engine(endpoint: Endpoint) -> Iterator[Engine]:
    engine = create_engine(endpoint.url("psycopg"))
    yield engine
    engine.dispose()


@pytest.fixture
async def async_engine(endpoint: Endpoint) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(endpoint.url("asyncpg"))
    yield engine
    await engine.dispose()


def test_psycopg(sync_engine: Engine) -> None:
    Base.metadata.create_all(sync_engine)
    with Session(sync_engine) as session:
        session.add_all(authors())
        session.commit()
        found = session.scalars(select(Author).where(Author.about["n"].as_integer() < 3).order_by(Author.id).options(selectinload(Author.books))).all()
        assert [len(a.books) for a in found] == [3, 3, 3]
        assert session.scalar(select(func.count()).select_from(Author).where(Author.tags.contains(["all"]))) == 30
        assert session.scalar(select(func.count()).select_from(Author).where(Author.about.contains({"n": 3}))) == 1
        found[0].name = "changed"
        session.flush()
        with pytest.raises(exc.IntegrityError), session.begin_nested():
            session.add(Author(name="changed"))
            session.flush()
        session.rollback()
        assert session.get_one(Author, found[0].id).name == "author 0"
        upsert = insert(Author).values(name="author 0", about={}, tags=[]).on_conflict_do_update(index_elements=["name"], set_={"about": {"new": 1}})
        session.execute(upsert)
        session.commit()
        assert session.scalar(select(Author.about).where(Author.name == "author 0")) == {"new": 1}
        with session.connection().execution_options(yield_per=10).execute(select(Book.title).order_by(Book.id)) as rows:
            assert len([*rows]) == 90
    assert sorted(inspect(sync_engine).get_table_names()) == ["authors", "books"]
    assert [c["name"] for c in inspect(sync_engine).get_columns("books")] == ["id", "title", "author_id"]
    assert [f["referred_table"] for f in inspect(sync_engine).get_foreign_keys("books")] == ["authors"]


async def test_asyncpg(async_engine: AsyncEngine) -> None:
    async with async_engine.begin() as c:
        await c.run_sync(Base.metadata.create_all)
    async with async_sessionmaker(async_engine, expire_on_commit=False)() as session:
        session.add_all(authors())
        await session.commit()
        found = (await session.scalars(select(Author).order_by(Author.id).limit(3).options(selectinload(Author.books)))).all()
        assert [len(a.books) for a in found] == [3, 3, 3]
        with pytest.raises(exc.IntegrityError):
            async with session.begin_nested():
                session.add(Author(name="author 1"))
                await session.flush()
        await session.rollback()
        rows = await session.stream(select(Book.title).execution_options(yield_per=10))
        assert len([r async for r in rows]) == 90
        assert (await session.execute(text("SELECT :a || 'b'").bindparams(a="a"))).scalar() == "ab"
    async with async_engine.connect() as c:
        assert sorted(await c.run_sync(lambda s: inspect(s).get_table_names())) == ["authors", "books"]


def test_a_workflow_in_the_session_s_transaction(endpoint: Endpoint, sync_engine: Engine) -> None:
    pieces = "SELECT df.start(:a ~> :b |=> 'x')" if endpoint.proxied else "SELECT df.start(df.as(df.seq(:a, :b), 'x'))"
    count = text("SELECT count(*) FROM df.instances")
    with Session(sync_engine) as session:
        before = session.scalar(count)
        session.execute(text(pieces), {"a": "SELECT 1", "b": "SELECT 2"})
        session.rollback()
        assert session.scalar(count) == before
        session.execute(text(pieces), {"a": "SELECT 1", "b": "SELECT 2"})
        session.commit()
        assert session.scalar(count) == (before or 0) + 1
