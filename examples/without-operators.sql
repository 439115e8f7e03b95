-- Functions only: this also runs on a direct connection, with `dfproxy worker` beside the server.
CREATE TABLE steps (n int);

SELECT df.start(
  df.seq(
    df.as(df.join('SELECT 1 AS n', 'SELECT 2 AS n'), 'both'),
    df.if('SELECT true', 'INSERT INTO steps VALUES (1)', 'INSERT INTO steps VALUES (0)')),
  'without-operators') AS id \gset

SELECT df.await_instance(:'id');
SELECT df.explain(:'id');
SELECT n FROM steps;
