-- Sales by shop, and the report that is made of them.
CREATE TABLE sales (
    id      int PRIMARY KEY,
    region  text NOT NULL,
    amount  numeric NOT NULL,
    sold_on date NOT NULL
);
CREATE TABLE report (
    region  text PRIMARY KEY,
    orders  bigint NOT NULL,
    revenue numeric NOT NULL,
    median  numeric NOT NULL,
    best    date NOT NULL,
    share   numeric
);

\copy sales FROM 'sales.csv' WITH (FORMAT csv, HEADER)
