-- A race: a file arrives (some other session inserts the row), or the deadline passes. The loser is stopped and leaves no trace.
CREATE TABLE inbox (name text, at timestamptz DEFAULT now());
CREATE TABLE outcome (what text);

SELECT df.setvar('wanted', 'prices.csv');

SELECT df.start(
  (df.loop('SELECT 1' ~> df.sleep(1), 'SELECT NOT EXISTS (SELECT FROM inbox WHERE name = ''{wanted}'')')
   ~> 'INSERT INTO outcome VALUES (''arrived'')')
  | (df.sleep(60) ~> 'INSERT INTO outcome VALUES (''too late'')'),
  'first-answer-wins') AS id \gset

INSERT INTO inbox (name) VALUES ('prices.csv');

SELECT df.await_instance(:'id');
SELECT what FROM outcome;
