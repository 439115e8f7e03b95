-- Two files arrive. A file and its workflow are one transaction: there is never one without the other.
BEGIN;
\copy staging (order_id, customer, product, quantity, price, sold_at) FROM 'sales-1.csv' WITH (FORMAT csv, HEADER)
UPDATE staging SET file = 'sales-1.csv' WHERE file IS NULL;
SELECT df.start(ingest('sales-1.csv'), 'ingest sales-1.csv') AS first \gset
COMMIT;
SELECT df.await_instance(:'first');

BEGIN;
\copy staging (order_id, customer, product, quantity, price, sold_at) FROM 'sales-2.csv' WITH (FORMAT csv, HEADER)
UPDATE staging SET file = 'sales-2.csv' WHERE file IS NULL;
SELECT df.start(ingest('sales-2.csv'), 'ingest sales-2.csv') AS second \gset
COMMIT;
SELECT df.await_instance(:'second');

SELECT file, lines, rejected, published FROM publications ORDER BY file;
SELECT file, reason FROM rejects ORDER BY line;
TABLE revenue ORDER BY product;
